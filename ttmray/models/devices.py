"""Which device work runs on."""

from ttmray.errors import UserError


def on_gpu(device: str, runner: str, gpus: float) -> bool:
    """Whether work runs on GPUs: in this process by what there is, in Ray actors by what they are given.

    Raises:
        UserError: see `resolve_device`; where the work is done by actors, this machine's devices do not matter.
    """
    if device == "cpu":
        return False
    return gpus > 0 if runner == "ray" else resolve_device(device) != "cpu"


def resolve_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu.

    Raises:
        UserError: torch knows no such device, or cuda was asked for and is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        index = torch.device(device).index or 0
    except RuntimeError as error:
        raise UserError(f"device is {device}, which torch does not know.", "Use auto, cpu or cuda.") from error
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        raise UserError(
            f"device is {device}, but torch sees {torch.cuda.device_count()} GPUs.",
            "Use auto or cpu, as in `--set runtime.device=auto`.",
        )
    return device
