"""Lightning callbacks: hooks only, they call what is below."""
