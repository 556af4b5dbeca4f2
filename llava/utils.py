"""Names that upstream's inference scripts import."""


def disable_torch_init() -> None:
    """Upstream skips torch's initialisation of weights that are loaded anyway; loading here never initialises them."""
