"""The replies that clients get, a file a protocol: `base` says what a Shape is."""
