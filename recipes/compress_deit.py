"""A DeiT in, a really faster one out.

python recipes/compress_deit.py --data imagenet_folder/     # timm's published DeiT-S, downloaded
python recipes/train_small_deit.py && python recipes/compress_deit.py --weights small_deit.safetensors
"""

import argparse
import json
from pathlib import Path

import timm
from train_small_deit import build

from compress import compress
from nas.tasks import make_task
from nas.weights import load_weights

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--weights", type=Path, help="a file of recipes/train_small_deit.py, instead of a download"
)
parser.add_argument("--data", default="imagenette", help="for the published DeiT: a data set or a folder")
parser.add_argument("--data-root", help="where data sets lie")
parser.add_argument("--pass", dest="passes", action="append", help="again for the next one")
parser.add_argument("--target", default="cpu:1")
parser.add_argument("--budget", default="latency=0.6")
parser.add_argument("--epochs", type=int)
parser.add_argument("--out", type=Path, help="write the bundle here")
arguments = parser.parse_args()

if arguments.weights is not None:
    about = json.loads(arguments.weights.with_suffix(".json").read_text())
    model = build(about["channels"], about["classes"], about["size"])
    load_weights(model, arguments.weights)
    task = make_task("image_classification", data=about["data"], data_root=arguments.data_root)
else:
    try:
        model = timm.create_model("deit_small_patch16_224", pretrained=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise SystemExit(
            f"the weights of deit_small_patch16_224 cannot be downloaded ({reason}).\nWithout a network: "
            "python recipes/train_small_deit.py, then --weights small_deit.safetensors"
        ) from None
    task = make_task(
        "image_classification", data=arguments.data, data_root=arguments.data_root, image_size=224
    )

passes = arguments.passes or ["structured:criterion=taylor", "class_token_last_block"]
settings = {"target": arguments.target, "budget": arguments.budget, "epochs": arguments.epochs}
result = compress(model, passes, train=task, report=print, **settings)
print(result)
if arguments.out:
    print("written:", result.export(arguments.out))
