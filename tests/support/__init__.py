"""What tests share: a loopback Hub, tiny models."""
