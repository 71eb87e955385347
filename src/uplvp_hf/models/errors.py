"""The base of all errors that are meant for the person at the keyboard."""


class UserError(ValueError):
    """Something that its reader can put right: a wrong file, value, name or combination of settings.

    The message says what is wrong, where (file, row, value), and what to do. Commands print it as one line; any other
    exception is a fault of the library and keeps its traceback.
    """
