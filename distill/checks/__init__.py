"""What `distill doctor` looks at, a file for each kind of mistake."""
