import threading, time
from ray.cluster_utils import Cluster
import ray
from actors.fleet import RolloutFleet, FleetSettings
from actors.gang import RankResources
from tests.served_tiny import make_folder
from tests.test_fleet import GATED, flat
from tests.test_rollouts import OPTIONS, make_tasks
STORE = 80 * 2**20
CH = [make_tasks(3, samples=3, first=10 * i) for i in range(6)]

def test_node(tmp_path):
    make_folder(tmp_path / "m")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE})
    node = nodes.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(nodes.address, log_to_driver=False)
    said = []
    try:
        with RolloutFleet.start("nodes", str(tmp_path / "m"), OPTIONS, FleetSettings(workers=2, resources=RankResources(1), start_deadline_s=300), said.append) as fleet:
            wanted = flat(fleet.roll(CH, GATED))
            def lose():
                nodes.remove_node(node, allow_graceful=False)
                print("removed", time.monotonic())
                nodes.add_node(num_cpus=1, object_store_memory=STORE)
                print("added", time.monotonic())
            t = threading.Timer(1.0, lose); t.start()
            began = time.monotonic()
            found = flat(fleet.roll(CH * 4, GATED))
            print("rolled", time.monotonic() - began)
            t.join()
            assert found == wanted * 4
            while any(f is None for f in fleet.facts):
                # settle the replacement
                from fbs_rl.gate_bundle import GateBundle
                from tests.test_serving import changed_gates
                model = make_folder(tmp_path / "m2")
                fleet.sync(changed_gates(model, 1))
            print("settled", time.monotonic() - began, said, fleet.facts)
            assert len(fleet.roll(CH, GATED)) == 6
            print(fleet.take_figures())
    finally:
        ray.shutdown(); nodes.shutdown()
