"""What `doctor` looks at: each module one part of the host; what can't be looked at is a finding too."""
