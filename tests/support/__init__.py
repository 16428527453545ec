"""What the tests stand on: real servers, a scripted one, and crawls in processes of their own."""
