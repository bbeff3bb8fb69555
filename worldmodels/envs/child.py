"""Real games in a process of their own, so that one that crashes or hangs takes nothing with it.

A worker thread of AtariVectorEnv that fails leaves its caller waiting for ever, and some ROMs abort the process. The
games therefore run in a child, and the parent waits for an answer with a limit. The child runs this module and imports
no more than it and the games, which takes a fraction of the seconds that torch does.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


class GameCrash(RuntimeError):
    """The games' process has ended, failed or fallen silent; the message says how."""


class ChildEnv:
    """An AtariVectorEnv in a child process; a context manager that leaves no process behind.

    Args:
        settings: arguments of AtariVectorEnv (`envs.atari.vector_settings`).
        num_envs: how many games are played side by side.
        patience: seconds that an answer may take.

    Raises:
        GameCrash: it cannot be made.
    """

    def __init__(self, settings: Mapping[str, Any], num_envs: int, patience: float = 120.0) -> None:
        self.num_envs, self.patience = num_envs, patience
        self._pipe, theirs = Pipe()
        # not by multiprocessing: a fork beside torch's threads may hang, and its other ways leave a helper behind
        command = [sys.executable, "-m", "worldmodels.envs.child", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        try:
            self._ask("open", {"num_envs": num_envs, **settings})
        except BaseException:
            self.close()
            raise

    def reset(self, **kwargs: Any) -> Any:
        """As of the environment."""
        return self._ask("reset", kwargs)

    def step(self, actions: Any) -> Any:
        """As of the environment.

        Raises:
            GameCrash: there is no answer, or an error instead of one.
        """
        return self._ask("step", {"actions": actions})

    def close(self) -> None:
        """End the child and wait for it; it has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def __enter__(self) -> "ChildEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, name: str, arguments: Mapping[str, Any]) -> Any:
        try:
            self._pipe.send((name, arguments))
            if not self._pipe.poll(self.patience):
                raise GameCrash(f"its process has not answered for {self.patience:g} s")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            code = self._process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise GameCrash(f"its process ended with {how}") from error
        if isinstance(answer, GameCrash):
            raise answer
        return answer


def _serve(pipe: Connection) -> None:
    import ale_py
    from ale_py.vector_env import AtariVectorEnv

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env: Any = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:  # the parent has gone
            return
        answer = None
        try:
            if name == "open":
                env = AtariVectorEnv(**arguments)
            else:
                answer = getattr(env, name)(**arguments)
        except Exception as error:  # whatever it is, the parent is to know
            answer = GameCrash(f"{type(error).__name__}: {error}")
        pipe.send(answer)


if __name__ == "__main__":
    from worldmodels.envs import child  # the parent's GameCrash is this module's, and not __main__'s

    child._serve(Connection(int(sys.argv[1])))
