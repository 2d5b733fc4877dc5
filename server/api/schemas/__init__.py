"""The bodies that clients send, as pydantic models, a file a protocol; the only package that knows pydantic."""
