"""An unmodified gRPC client: TARGET METHOD. It knows of no proxy and of no token."""

import json
import sys

import grpc

target, method = sys.argv[1:3]
encode = lambda message: json.dumps(message).encode()
with grpc.secure_channel(target, grpc.ssl_channel_credentials()) as channel:
    kind = channel.unary_stream if method == "WatchOrders" else channel.unary_unary
    call = kind(f"/orders.v1.Orders/{method}", request_serializer=encode, response_deserializer=json.loads)
    try:
        answer = call({"asked": "by grpc"}, timeout=20)
        messages = list(answer) if method == "WatchOrders" else [answer]
        print(json.dumps({"status": "OK", "messages": messages}))
    except grpc.RpcError as error:
        print(json.dumps({"status": error.code().name, "details": error.details()}))
