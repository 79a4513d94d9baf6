"""A DeiT in, a really faster one out.

python recipes/compress_deit.py --data imagenet_folder/     # timm's published DeiT-S, downloaded
python recipes/train_small_deit.py && python recipes/compress_deit.py --weights small_deit.safetensors
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

import timm
from train_small_deit import load

from compress import compress
from nas.errors import mistakes_end
from nas.tasks import make_task

NAME = "deit_small_patch16_224"
OFFLINE = f"{NAME} cannot be downloaded ({{}}); give --weights FILE (recipes/train_small_deit.py makes one)"
parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--weights", help=f".safetensors of {NAME}, or of train_small_deit.py")
parser.add_argument("--data", help="a folder of class folders (default: what --weights was trained on)")
parser.add_argument("--data-root", help="where data sets lie")
parser.add_argument("--pass", dest="passes", action="append", help="again for the next one")
parser.add_argument("--target", default="cpu:1")
parser.add_argument("--budget", default="latency=0.6")
parser.add_argument("--epochs", type=int)
parser.add_argument("--out", help="write the bundle here")
given = parser.parse_args()
with mistakes_end(parser):
    try:
        fresh = None if given.weights else timm.create_model(NAME, pretrained=True)
    except Exception as error:  # every layer of a download raises kinds of its own
        parser.error(OFFLINE.format(str(error)[:120]))
    model, about = (fresh, {}) if fresh else load(given.weights)
    data = given.data or about.get("data") or parser.error("--data: give ImageNet, or your own class folders")
    size = about.get("size", 224)
    task = make_task("image_classification", data=data, data_root=given.data_root, image_size=size)
    passes = given.passes or ["structured:criterion=taylor", "class_token_last_block"]
    settings = {"target": given.target, "budget": given.budget, "epochs": given.epochs}
    result = compress(model, passes, train=task, savable=given.out is not None, report=print, **settings)
    print(result, f"written: {result.export(given.out)}" if given.out else "", sep="\n")
