"""A bundle whose models stay loaded: for callers that use them again and again, such as the Python API."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ttmray.models.bundle import Bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.protocol import Protocol


@dataclass(frozen=True)
class KeptBundle(Bundle):
    """A bundle in all but this: what it has loaded it gives again, instead of loading it once more."""

    base: Bundle
    _models: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.base.name

    @property
    def note(self) -> str:  # type: ignore[override]
        return self.base.note

    @property
    def licence_notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.licence_notes

    @property
    def clip_s(self) -> float:  # type: ignore[override]
        return self.base.clip_s

    @property
    def sampling(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.base.sampling

    def roles(self) -> set[str]:
        return self.base.roles()

    def require(self, roles: Collection[str]) -> None:
        self.base.require(roles)

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        return self.base.identity(roles)

    def backbone_file(self) -> Path | None:
        return self.base.backbone_file()

    def weights(self, roles: Collection[str] | None = None) -> list[str]:
        return self.base.weights(roles)

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        return self.base.protocol(reward_text)

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        def keeping(role: str, make: Callable[[], Any]) -> Callable[[], Any]:
            key = (role, options, device, vocoder and role == "latents")

            def get() -> Any:
                if key not in self._models:
                    self._models[key] = make()
                return self._models[key]

            return get

        return {role: keeping(role, make) for role, make in self.base._makers(options, device, vocoder).items()}
