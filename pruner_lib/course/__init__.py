"""The exercises of the notebooks: checks that explain themselves, and student versions from one source.

    python -m pruner_lib.course student OUT      student versions of all notebooks
    python -m pruner_lib.course exercises        the list of exercises

``checks_03`` holds the checks of notebook 03, and so on. No stage of the library imports this package.
"""
