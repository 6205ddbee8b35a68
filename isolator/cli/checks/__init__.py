"""What `doctor` looks at: each module one part of the host, each function findings, none of them an exception."""
