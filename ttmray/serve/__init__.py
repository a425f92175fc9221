"""The try-out page: prompts in, clips to listen to, votes out; on this machine, in a browser."""
