"""Layers of the original EMoE from their state dicts, by the original's names of parameters and options.

Source: see ``spaces.layers.expert_mlp``; its sheet of names: ``experts.batched_fc1_w`` (N, s, d), ``batched_fc1_bias``
(N, s), ``batched_fc2_w`` (N, s, out), ``batched_fc2_bias`` (N, out), and ``gates.0.wg.weight`` (N, d) or
``gates.0.{temperature, sim_matrix, cosine_projector.weight, cosine_projector.bias}``; of the gated form
``gate_proj``, ``up_proj`` and ``down_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spaces.errors import UserMistake, nearest
from spaces.layers.expert_gates import CosineGate
from spaces.layers.expert_mlp import ExpertMlp
from spaces.layers.expert_swiglu import ExpertSwiGLU

__all__ = ["load_emoe", "load_emoe_swiglu"]

_COUNT = "_num_global_experts"
_EXPERTS = ("batched_fc1_w", "batched_fc1_bias", "batched_fc2_w", "batched_fc2_bias")
_KEY_GATE = "gates.0.wg.weight"
_COSINE = {
    "temperature": "gates.0.temperature",
    "similarity": "gates.0.sim_matrix",
    "projector.weight": "gates.0.cosine_projector.weight",
    "projector.bias": "gates.0.cosine_projector.bias",
}
_SELECT = {"gate": "average", **{name: name for name in ("up", "up_abs", "inter", "inter_abs")}}


def load_emoe(
    state: Mapping[str, Tensor],
    *,
    top_k: int,
    model_dim: int | None = None,
    hidden: int | None = None,
    num_experts: int | None = None,
    gate_type: str | None = None,
    capacity_factor: float = 0.0,
    gate_noise: float = 0.0,
    batch_prioritized_routing: bool = True,
    one_score_gate: bool | None = None,
    normalize_one_score_gate: bool = False,
    normalize_gate: bool = True,
    fp32_gate: bool = True,
    act: nn.Module | None = None,
    cluster_ids: Tensor | None = None,
    prefix: str | None = None,
    form: str = "auto",
) -> ExpertMlp:
    """One MoE layer of the original as ``ExpertMlp``, in evaluation mode, of the types and on the device of ``state``.

    Copies of the second layer's bias that are equal (as the split makes them) become the one bias of the layer, k times
    the copy; those that a training has moved apart stay with their experts.

    Args:
        state: the original's state dict, or one that holds it under a prefix; what lies elsewhere is not looked at.
        top_k: experts of a token, at least 1; more than there are count as all of them.
        model_dim, hidden, num_experts: d, h and N; the state tells them, given ones must agree.
        gate_type: ``top`` (a linear map) or ``cosine_top``; likewise.
        capacity_factor: see ``Experts``; 0 drops nothing. A negative one limits as its amount does.
        gate_noise: of trainings alone, at least 0: the option ``noise`` of the pass ``emoe``.
        batch_prioritized_routing: with a capacity, tokens that are surest of their first choice come first.
        one_score_gate: chosen experts count with weight 1; else by the softmax. None: with gate ``top``.
        normalize_one_score_gate: tokens are brought to length 1 for gate ``top``.
        normalize_gate: with k above 1, values of the softmax are made to sum up to 1; with k = 1 they never are.
        fp32_gate: gates compute in float32 at least, here always: False is refused where that makes a difference.
        act: activation; exact GELU where it is not given, as for vision and BERT.
        cluster_ids: (h,) expert of every hidden unit of the dense network, in [0, N): so that ``dense()`` gives the
            units their original order. None leaves them as they lie.
        prefix: of the layer's names, as ``blocks.8.mlp``; None finds the only layer there is.
        form: see ``Experts``.

    Raises:
        UserMistake: names are missing, too many or of odd shapes, or an option is out of its range or does not agree.
    """
    own = _below(state, prefix, "experts.batched_fc1_w")
    kind = _gate_type(own, gate_type)
    _refuse_others(own, kind)
    keys, values = _of_all(own, "batched_fc1_w", 3), _of_all(own, "batched_fc2_w", 3)
    key_bias, bias = _of_all(own, "batched_fc1_bias", 2), _of_all(own, "batched_fc2_bias", 2)
    if keys is None or values is None or keys.shape[:2] != values.shape[:2]:
        raise UserMistake(
            "load_emoe: experts.batched_fc1_w and batched_fc2_w must be (N, s, d) and (N, s, out)"
        )
    count, size, dim = keys.shape
    for name, found, shape in (
        ("batched_fc1_bias", key_bias, (count, size)),
        ("batched_fc2_bias", bias, (count, values.shape[2])),
    ):
        if found is not None and found.shape != shape:
            raise UserMistake(f"load_emoe: experts.{name} is {tuple(found.shape)}, not {shape}")
    _agree(
        "load_emoe",
        model_dim=(model_dim, dim),
        hidden=(hidden, count * size),
        num_experts=(num_experts, count),
    )
    if top_k < 1 or gate_noise < 0:
        raise UserMistake(f"load_emoe: top_k={top_k} must be at least 1, gate_noise={gate_noise} at least 0")
    if not fp32_gate and keys.dtype.itemsize < 4:
        raise UserMistake(f"load_emoe: fp32_gate=False: gates in {keys.dtype} are not built; give True")
    k = min(top_k, count)
    ones = kind == "top" if one_score_gate is None else one_score_gate
    gate = "learned" if kind == "cosine_top" else "normalised" if normalize_one_score_gate else "average"
    equal = bias is None or bool((bias == bias[:1]).all())
    made = ExpertMlp(
        dim,
        count * size,
        count,
        k,
        out=values.shape[2],
        gate=gate,
        capacity=abs(capacity_factor),
        weighting="ones" if ones else "shares" if normalize_gate and k > 1 else "scores",
        total=1.0,
        prioritised=batch_prioritized_routing,
        form=form,
        key_bias=key_bias is not None,
        value_bias=bias is not None,
        own_biases=not equal,
        gate_width=own[_COSINE["similarity"]].shape[0] if gate == "learned" else 256,
        act=act,
    ).to(keys)
    made.keys.data, made.values.data = keys.flatten(0, 1).clone(), values.flatten(0, 1).clone()
    if key_bias is not None:
        made.key_bias = nn.Parameter(key_bias.flatten().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias[0] * k if equal else bias.clone())
    if cluster_ids is not None:
        made.units.copy_(_units(cluster_ids, count, size))
    _load_gate(made, own)
    return made.eval()


def load_emoe_swiglu(
    state: Mapping[str, Tensor],
    *,
    n_expert: int,
    topk: int,
    select: str = "gate",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    cluster_ids: Tensor | None = None,
    rearranged: bool = True,
    act: nn.Module | None = None,
    prefix: str | None = None,
    form: str = "auto",
) -> ExpertSwiGLU:
    """One gated network of the original's LLaMA form as ``ExpertSwiGLU``; see ``load_emoe``.

    Args:
        state: with ``gate_proj.weight`` (h, d), ``up_proj.weight`` (h, d) and ``down_proj.weight`` (out, h).
        n_expert, topk: N, and experts of a token, in [1, N].
        select: what scores an expert: ``gate``, ``up``, ``up_abs``, ``inter`` or ``inter_abs``.
        hidden_size, intermediate_size: d and h; the state tells them, given ones must agree.
        cluster_ids: (h,) expert of every hidden unit of the dense network. Needed where it is not rearranged; else it
            only gives ``dense()`` the original order.
        rearranged: hidden units lie expert by expert, as the original leaves them; False takes the dense network.
        act: activation; SiLU where it is not given.
        prefix: of the layer's names, as ``layers.16.mlp``; None finds the only layer there is.
        form: see ``Experts``.

    Raises:
        UserMistake: as ``load_emoe``.
    """
    own = _below(state, prefix, "gate_proj.weight")
    names = ("gate_proj", "up_proj", "down_proj")
    if missing := [name for name in names if f"{name}.weight" not in own]:
        raise UserMistake(f"load_emoe_swiglu: the state has no {missing[0]}.weight")
    keys, factors, values = (
        _linear(own[f"{name}.weight"], own.get(f"{name}.bias"), f"{name}.weight") for name in names
    )
    if keys.weight.shape != factors.weight.shape or values.in_features != keys.out_features:
        raise UserMistake("load_emoe_swiglu: gate_proj and up_proj must be (h, d), down_proj (out, h)")
    units = keys.out_features
    _agree(
        "load_emoe_swiglu",
        hidden_size=(hidden_size, keys.in_features),
        intermediate_size=(intermediate_size, units),
    )
    if select not in _SELECT:
        raise UserMistake(
            f"load_emoe_swiglu: select={select!r}{nearest(select, _SELECT)}; allowed: {', '.join(_SELECT)}"
        )
    if n_expert < 1 or units % n_expert:
        raise UserMistake(f"load_emoe_swiglu: n_expert={n_expert} must divide the {units} hidden units")
    if cluster_ids is None and not rearranged:
        raise UserMistake("load_emoe_swiglu: cluster_ids: needed for a network that is not rearranged")
    in_order = torch.arange(units, device=keys.weight.device) // (units // n_expert)
    labels = in_order if rearranged or cluster_ids is None else cluster_ids.to(in_order)
    act = nn.SiLU() if act is None else act
    made = ExpertSwiGLU.of(keys, factors, values, act, labels, topk, gate=_SELECT[select], form=form)
    if rearranged and cluster_ids is not None:
        made.units.copy_(_units(cluster_ids, n_expert, units // n_expert))
    return made.eval()


def _below(state: Mapping[str, Tensor], prefix: str | None, name: str) -> dict[str, Tensor]:
    """The entries of one layer, by their names within it."""
    if prefix is None:
        found = [key.removesuffix(name) for key in state if key == name or key.endswith(f".{name}")]
        if len(found) > 1:
            places = ", ".join(sorted(one.rstrip(".") for one in found))
            raise UserMistake(f"prefix: the state holds several layers; give one of {places}")
        start = found[0] if found else ""
    else:
        start = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    if name not in own:
        raise UserMistake(f"the state holds no {start}{name}")
    return own


def _gate_type(own: Mapping[str, Tensor], given: str | None) -> str:
    found = [
        kind
        for kind, names in (("top", (_KEY_GATE,)), ("cosine_top", tuple(_COSINE.values())))
        if all(name in own for name in names)
    ]
    if len(found) != 1:
        raise UserMistake(
            f"load_emoe: the state must hold either {_KEY_GATE}, or all of {', '.join(_COSINE.values())}"
        )
    if given not in (None, found[0]):
        raise UserMistake(f"load_emoe: gate_type={given!r}, but the state holds a gate {found[0]!r}")
    return found[0]


def _refuse_others(own: Mapping[str, Tensor], kind: str) -> None:
    gate = (_KEY_GATE,) if kind == "top" else tuple(_COSINE.values())
    known = {_COUNT, *(f"experts.{name}" for name in _EXPERTS), *gate}
    beside = [name for name in own if name not in known and name.startswith(("experts.", "gates."))]
    if beside:
        raise UserMistake(f"load_emoe: the state's {beside[0]} is unknown; known: {', '.join(sorted(known))}")


def _of_all(own: Mapping[str, Tensor], name: str, dims: int) -> Tensor | None:
    """An entry of the experts, for each of them also where they share it; None where there is none."""
    found = own.get(f"experts.{name}")
    if found is None:
        return None
    gate = own.get(_KEY_GATE)
    count = gate.shape[0] if gate is not None else own[_COSINE["similarity"]].shape[1]
    if found.dim() != dims or found.shape[0] not in (1, count):
        raise UserMistake(
            f"load_emoe: experts.{name} is {tuple(found.shape)}; wanted {dims} dimensions, the first for the "
            f"{count} experts of the gate"
        )
    return found.detach().expand(count, *found.shape[1:])


def _load_gate(made: ExpertMlp, own: Mapping[str, Tensor]) -> None:
    names = _COSINE if isinstance(made.gate, CosineGate) else {"weight": _KEY_GATE}
    state = {mine: own[theirs].detach() for mine, theirs in names.items()}
    try:
        made.gate.to(next(iter(state.values())).dtype).load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserMistake(f"load_emoe: the gate does not fit the experts ({reason})") from None


def _linear(weight: Tensor, bias: Tensor | None, name: str) -> nn.Linear:
    if weight.dim() != 2:
        raise UserMistake(f"{name} is {tuple(weight.shape)}; wanted two dimensions")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _units(cluster_ids: Tensor, count: int, size: int) -> Tensor:
    labels = cluster_ids.long()
    if labels.shape != (count * size,) or torch.bincount(labels, minlength=count).tolist() != [size] * count:
        raise UserMistake(
            f"cluster_ids: must give each of {count} experts {size} of the {count * size} units"
        )
    return labels.argsort(stable=True)


def _agree(who: str, **sizes: tuple[int | None, int]) -> None:
    for name, (given, found) in sizes.items():
        if given not in (None, found):
            raise UserMistake(f"{who}: {name}={given}, but the state has {found}")
