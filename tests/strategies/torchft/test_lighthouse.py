"""The lighthouse's address, and what it says."""

import socket
import threading

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_entropy.strategies.torchft.lighthouse import address_toward, lighthouse_address, said_by


def test_an_answer_of_the_lighthouse_that_breaks_off_ends_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nNext quorum")

        thread = threading.Thread(target=answer)
        thread.start()
        assert said_by(f"http://127.0.0.1:{listener.getsockname()[1]}") == ", which does not answer"
        thread.join()


def test_what_it_says_of_the_next_quorum_ends_a_sentence() -> None:
    page = b"<p>Next quorum status: waiting for 1 of 2\n</p>"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page)

        thread = threading.Thread(target=answer)
        thread.start()
        said = said_by(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert said == ", which says: waiting for 1 of 2"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://localhost", "https://localhost:1"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="the lighthouse's address must be http://host:port"):
        address_toward(address)


def test_its_address_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://there:1")
    assert lighthouse_address() == "http://there:1"
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE")
    with pytest.raises(MisconfigurationException, match="needs TORCHFT_LIGHTHOUSE, the lighthouse's address"):
        lighthouse_address()
