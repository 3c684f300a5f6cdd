"""The systems that can be measured, by name. Nothing here imports a peer's library before it is asked."""

from __future__ import annotations

from memfaas.bench.peers.base import System
from memfaas.bench.peers.dragon_dict import DragonDict
from memfaas.bench.peers.floors import MemoryCopy, RoundTrip
from memfaas.bench.peers.lmdb_file import Lmdb
from memfaas.bench.peers.memcached_server import Memcached
from memfaas.bench.peers.memfaas_store import MemfaasShm, MemfaasTcp
from memfaas.bench.peers.mooncake_store import Mooncake
from memfaas.bench.peers.redis_server import RedisTcp, RedisUnix

SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (
        MemfaasShm,
        MemfaasTcp,
        MemoryCopy,
        RoundTrip,
        Lmdb,
        RedisUnix,
        RedisTcp,
        Memcached,
        Mooncake,
        DragonDict,
    )
}
