"""Ways to run the one operation. Each module has ``refusal(request) -> str | None`` and ``run(request) -> Result``, and may
have ``taken_unasked() -> bool``, whether ``backend="auto"`` takes it."""

from types import ModuleType

from attnzoo.core.backends import blockwise, cudnn, dense, pallas

#: By name, in the order in which ``backend="auto"`` prefers them where several can run a request.
BACKENDS: dict[str, ModuleType] = {"cudnn": cudnn, "pallas": pallas, "blockwise": blockwise, "dense": dense}
