"""Compares facts over ranks, so that ranks that differ are refused before they train together."""

from collections.abc import Mapping

from mmtrain.errors import ConfigError


def refuse_difference(facts: Mapping[str, str], remedy: str) -> None:
    """Compare facts by name over ranks; a collective. ``remedy`` ends the message.

    Raises ConfigError, on every rank, for the first fact whose value is not the same as on rank 0.
    """
    from mmtrain import dist

    everyone = dist.gather_objects(dict(facts))
    expected = everyone[0]
    for rank, found in enumerate(everyone):
        for name, value in found.items():
            if value != expected.get(name):
                raise ConfigError(
                    f"{name} differs between ranks: rank {rank} has {value}, rank 0 has {expected.get(name)}; {remedy}"
                )
