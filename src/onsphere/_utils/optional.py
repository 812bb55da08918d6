"""The one message for a missing optional package."""


def missing_extra(purpose: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Say which extra brings a package that is not installed.

    Example:
        >>> missing_extra("drawing figures", ModuleNotFoundError("", name="matplotlib")).args[0]
        'drawing figures needs matplotlib: pip install "onsphere[study]"'
    """
    name = (error.name or "another package").partition(".")[0]
    message = f'{purpose} needs {name}: pip install "onsphere[study]"'
    return ModuleNotFoundError(message, name=error.name)
