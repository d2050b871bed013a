"""What an ordinary pass of the backbone shows of its inputs."""
