"""Copies published weights into networks of this library, by names and layouts of their own."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def copy_weights(
    network: nn.Module,
    published: Mapping[str, Tensor],
    source: Callable[[str], str],
    convert: Callable[[str, Tensor], Tensor],
) -> None:
    """Copy weights in place: `source` is the published name of a tensor, `convert` its layout.

    Raises `ValueError`, before anything is changed, if a name is missing or unknown or a shape
    differs.
    """
    ready: dict[str, Tensor] = {}
    missing, wrong, unknown = [], [], set(published)
    for name, target in network.state_dict().items():
        published_name = source(name)
        unknown.discard(published_name)
        if published_name not in published:
            missing.append(published_name)
            continue
        original = published[published_name]
        value = convert(name, original)
        if value.shape != target.shape:
            wrong.append(f"{published_name} {tuple(original.shape)}")
        ready[name] = value
    faults = {"missing": missing, "unknown": sorted(unknown), "of another shape": wrong}
    parts = [f"{kind}: {_few(names)}" for kind, names in faults.items() if names]
    if parts:
        raise ValueError(f"these weights do not fit the network; {'; '.join(parts)}")
    network.load_state_dict(ready)


def queries_first(value: Tensor, num_heads: int) -> Tensor:
    """Published channels of `qkv` (heads, features and, fastest, q k v) with q k v outermost."""
    split = value.reshape(num_heads, -1, 3, *value.shape[1:])
    return split.movedim(2, 0).reshape(value.shape)


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
