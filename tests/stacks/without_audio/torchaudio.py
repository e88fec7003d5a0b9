"""In place of torchaudio, which PyPI has for CUDA only: LLaMA-Factory imports it, and uses it to read audio alone."""
