"""GGUF files: the reader (mapped, trusting nothing), the one writer, the numpy reference of the quantised blocks, tensor names, and synthetic models."""
