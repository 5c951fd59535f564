"""Numbers of things in sentences."""


def counted(number: float, noun: str, form: str = "", plural: str = "") -> str:
    """A number with its noun, in the plural unless the number reads 1: `1 GPU`, `8 GPUs`, `1,200 steps`.

    Args:
        number: how many.
        noun: what is counted, in the singular.
        form: how the number is written, as in `format`.
        plural: of a noun that takes more than an s, such as `micro-batches`.
    """
    shown = format(number, form)
    return f"{shown} {noun}" if shown == "1" else f"{shown} {plural or f'{noun}s'}"
