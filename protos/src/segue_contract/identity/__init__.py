"""Who calls, and what they may do: principals, rights, session tokens, tenants' keys.

Without I/O, clock or chance: `now_s` and random bytes come from outside, and so does the text of a
file of keys. Only `keys` and `tokens` import cryptography and PyJWT.
"""
