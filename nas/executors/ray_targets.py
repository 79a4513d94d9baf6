"""The part of a target's text that says on which nodes of a cluster it is measured."""

from __future__ import annotations

import re
from typing import Any

from nas.errors import UserMistake

__all__ = ["placed", "split_ray_target"]

_PREFIX = "ray:"
_RESOURCE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def split_ray_target(text: str) -> tuple[str | None, str]:
    """The custom resource of a node and the rest of the target: ``ray:jetson/cpu:1`` is ``("jetson", "cpu:1")``.

    Without the prefix the resource is None and the text is as it was: latency counts where candidates train.
    Raises UserMistake when the prefix is not followed by a resource, a slash and a target.
    """
    text = text.strip()
    if not text.startswith(_PREFIX):
        return None, text
    resource, slash, rest = text.removeprefix(_PREFIX).partition("/")
    if not slash or not rest.strip() or not _RESOURCE.fullmatch(resource):
        raise UserMistake(
            f"target {text!r}: must be ray:RESOURCE/TARGET, with the name of a custom resource of the cluster, "
            "as in ray:jetson/cpu:1"
        )
    if resource in _OWN:
        raise UserMistake(
            f"target {text!r}: {resource} is not a custom resource; name one that a node was started with, "
            "as in ray start --resources='{\"jetson\": 1}'"
        )
    return resource, rest.strip()


def placed(target: str | None) -> dict[str, Any]:
    """Arguments of ``submit`` for a job that measures on ``target``: where it must run, if that matters."""
    resource = split_ray_target(target or "")[0]
    return {} if resource is None else {"where": resource}
