"""The command ``scrapy streaming``.

What may live here: ``command`` (the entry point, imported by every ``scrapy`` call), ``registry`` (how a verb
declares itself and is found), ``output``, ``stores`` and one module a verb in ``verbs``.
"""
