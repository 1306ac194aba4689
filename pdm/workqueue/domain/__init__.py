"""The words and rules of the queue: pure, without Twisted, SQL, clocks or chance."""
