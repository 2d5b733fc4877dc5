"""Text: strings and token ids, nothing of HTTP or engines.

A prompt: messages -> template -> tokenizer. A reply: ids -> detokenizer -> stop strings -> reasoning, so that stop strings see the raw text.
"""
