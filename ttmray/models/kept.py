"""A bundle whose models stay loaded: for callers that use them again and again, such as the Python API."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ttmray.models.bundle import BundleOver
from ttmray.models.loading import LoadOptions


@dataclass(frozen=True)
class KeptBundle(BundleOver):
    """A bundle in all but this: what it has loaded it gives again, instead of loading it once more."""

    _models: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        def keeping(role: str, make: Callable[[], Any]) -> Callable[[], Any]:
            key = (role, options, device, vocoder and role == "latents")

            def get() -> Any:
                if key not in self._models:
                    self._models[key] = make()
                return self._models[key]

            return get

        return {role: keeping(role, make) for role, make in self.base._makers(options, device, vocoder).items()}
