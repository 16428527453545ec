"""``python -m support.two_spiders`` runs two spiders of the tests' crawls in one process.

What may live here: this one program, which ``run_crawl(program=…)`` starts.
"""

from __future__ import annotations

from scrapy.crawler import AsyncCrawlerProcess
from scrapy.utils.project import get_project_settings

if __name__ == "__main__":
    process = AsyncCrawlerProcess(get_project_settings())
    for name in ("files", "from-start"):
        process.crawl(name)
    process.start()
