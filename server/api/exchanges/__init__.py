"""From a client's raw body to an Exchange, a file a protocol. Pure, but for the clock and the new ids; every mistake is a RequestError."""
