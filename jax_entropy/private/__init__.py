"""A trained model under secure computation: nobody sees both its weights and its prompt, and every byte is counted.

Rooms, each built on those before it: `engine` shares arrays and runs programs on them, `program` is the model as such
programs, `session` lets it answer a prompt, in one process or two, and `cost` accounts for what that takes.
"""
