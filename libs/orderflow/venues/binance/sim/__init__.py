"""A simulated Binance USD-M exchange on loopback: the real protocol, fed by a recorded or a synthetic market."""
