"""Write the README's results from claims and leaderboard; to be run after a recorded table has changed."""

from wsolnb.files import resolve, write_atomically
from wsolnb.notebook.reports import results, with_results

if __name__ == "__main__":
    path = resolve("README.md")
    write_atomically(path, with_results(path.read_text(encoding="utf-8"), results()))
