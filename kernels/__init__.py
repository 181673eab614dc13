"""Torch and Triton kernels of the unified pool; import the submodules by name.

The Hugging Face package of the same name is probed by transformers, which reads `__version__`.
"""

__version__ = "0.1.0"
