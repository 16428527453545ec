"""The verbs of ``scrapy streaming``, one module each; a module here is a verb of its name.

Its docstring is the verb's help: the first line stands in the list of verbs. Its ``VERB`` declares the
options and the function that runs. A keyword of Python gets an underscore: ``import_`` is the verb
``import``.
"""
