"""What runs inside a sandbox before, around and instead of untrusted code; it imports the standard library only."""
