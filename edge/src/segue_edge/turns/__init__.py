"""Turns as this node serves them: what devices see, the prompt, the tokens, the life of one."""
