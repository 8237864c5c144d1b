"""A YAML recipe in, a validated frozen value out, every mistake explained. No torch."""
