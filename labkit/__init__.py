"""The map freshness lab: why a reader of an eBPF map still sees the old value."""

__version__ = "0.1.0"
