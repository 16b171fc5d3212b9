"""Attention and element-wise kernels: Triton, each with a PyTorch reference.

Imports nothing, and keeps a version below every release of Hugging Face's distribution of the same
name: transformers imports whatever is called `kernels` while it probes for that distribution.
"""

__version__ = "0.0.0"
