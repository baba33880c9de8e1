"""Packaging: ranges live here, the exact versions of one tested set in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = ['\"](.+)['\"]", (ROOT / 'mmpeft/version.py').read_text())[1]

# mmengine is not required here although `import mmpeft` needs it. Two
# distributions provide it, mmengine and onedl-mmengine, with the same file
# names: pip takes them for different packages, so naming either would
# overwrite the files of a user who has the other. The extras name OneDL's.
CORE = ['torch>=2.7', 'numpy', 'rich>=13', 'safetensors>=0.4']
OPENMMLAB = [
    'torch>=2.7,<2.14',  # mmcv 2.3 compiles as C++17, torch 2.14 needs C++20
    'torchvision',
    'numpy',
    'timm>=1.0.20',
    'onedl-mmengine>=0.10.12,<1',
    'onedl-mmcv>=2.3.6,<3',
]
DET = [*OPENMMLAB, 'onedl-mmdetection>=3.5.1,<4']
ONNX = ['onnx>=1.17', 'onnxruntime>=1.20', 'onnxscript>=0.5']
QUANTIZED = [
    'torchao>=0.18,<0.19',  # the tensors that frozen_dtype is made of
    'accelerate>=1',  # builds networks without memory for their weights
]
EXTRAS = {
    'det': DET,
    'cls': [*OPENMMLAB, 'onedl-mmpretrain>=1.3.6,<2'],
    'seg': [*OPENMMLAB, 'onedl-mmsegmentation>=1.4.2,<2'],
    'rotate': [*DET, 'onedl-mmrotate>=1.2.1,<2'],
    'onnx': ONNX,
    'quantized': QUANTIZED,
    'projects': [
        'accelerate>=1',
        'datasets>=4',
        'diffusers>=0.35',
        'scikit-learn>=1.5',
        'sentencepiece>=0.2',
        'submitit>=1.5',
        'transformers>=4.53,<5',  # mmpretrain does not import beside transformers 5
    ],
    'docs': ['furo>=2024.8.6', 'myst-parser>=4', 'sphinx>=8.1'],
    'dev': [
        *ONNX,
        *QUANTIZED,
        'bitsandbytes>=0.50',  # tests of its layers
        'hypothesis>=6',
        'lycoris-lora>=4.1',
        'mat4py',  # mmpretrain's multimodal models, which it imports beside transformers
        'onedl-mmpretrain>=1.3.6,<2',
        'peft>=0.21',
        'pytest>=9',
        'ruff>=0.12',
        'scikit-learn>=1.5',
        'transformers>=4.53,<5',  # mmpretrain does not import beside transformers 5
    ],
}
EXTRAS['all'] = sorted({need for needs in EXTRAS.values() for need in needs})

setup(
    name='mmpeft',
    version=VERSION,
    description='Parameter-efficient fine-tuning of large vision backbones in OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    install_requires=CORE,
    extras_require=EXTRAS,
    packages=find_packages(include=['mmpeft', 'mmpeft.*']),
    # In the checkout .mim holds links to configs/ and tools/; a wheel holds the
    # files, which is where mmengine looks for `_base_ = 'mmpeft::...'`.
    package_data={
        'mmpeft': [
            '.mim/*.yml',
            *(
                f'.mim/{folder}/**/*.{ending}'
                for folder in ('configs', 'tools')
                for ending in ('py', 'sh', 'md')
            ),
        ]
    },
    zip_safe=False,
)
