"""Text: strings and token ids, nothing of HTTP or engines.

A prompt: messages -> template -> tokenizer. A reply: ids -> detokenizer -> stop strings -> reasoning, answer and calls of tools; stop strings
come first because they see the raw text.
"""
