"""World models that learn from logged Atari play and dream open-loop rollouts.

The names below are imported on first use, so that `import worldmodels` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Episode": "worldmodels.types",
    "Segment": "worldmodels.types",
    "Step": "worldmodels.types",
    "UserError": "worldmodels.types",
    "Store": "worldmodels.data.store",
    "DiffusionWorldModel": "worldmodels.models.diffusion",
    "imagine": "worldmodels.imagination",
    "ImaginationEnv": "worldmodels.imagination",
    "LoggedActions": "worldmodels.imagination",
    "RandomPolicy": "worldmodels.imagination",
    "WorldModelLearner": "worldmodels.learners.world_model",
    "load_learner": "worldmodels.learners.world_model",
    "load_model": "worldmodels.portable.folder",
    "load_policy": "worldmodels.learners.policy",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'worldmodels' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
