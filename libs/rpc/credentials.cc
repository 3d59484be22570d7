#include "libs/rpc/credentials.h"

#include <grpc/grpc_security.h>
#include <grpcpp/impl/grpc_library.h>

#include <utility>

#include "libs/base/mutex.h"
#include "libs/rpc/grpc_log.h"

namespace minke::rpc {
namespace {

// gRPC's C++ interface to certificates that change watches files without looking at what they hold (1.51),
// and a pair that does not match would end its service. Its C interface asks for them, as here.
class FollowingCredentials final : public grpc::ServerCredentials {
 public:
  explicit FollowingCredentials(std::shared_ptr<tls::Identity> identity)
      : identity_(std::move(identity)),
        credentials_(grpc_ssl_server_credentials_create_with_options(
            grpc_ssl_server_credentials_create_options_using_config_fetcher(
                identity_->current()->ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                 : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY,
                &FollowingCredentials::Fetch, this))) {}
  ~FollowingCredentials() override { grpc_server_credentials_release(credentials_); }

  // Nobody here has metadata looked at. Says nothing, as gRPC's own credentials without TLS.
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  // Before every handshake.
  static grpc_ssl_certificate_config_reload_status Fetch(void* self,
                                                         grpc_ssl_server_certificate_config** config) {
    auto& here = *static_cast<FollowingCredentials*>(self);
    const std::shared_ptr<const tls::Material> now = here.identity_->current();
    const MutexLock lock(here.mutex_);
    if (now == here.given_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair{now->key.c_str(), now->certificate.c_str()};
    // gRPC insists on some CA, also where it asks nobody for a certificate.
    const std::string& ca = now->ca.empty() ? now->certificate : now->ca;
    *config = grpc_ssl_server_certificate_config_create(ca.c_str(), &pair, 1);
    here.given_ = now;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<tls::Identity> identity_;  // shared with the other servers and clients of the process
  Mutex mutex_;
  std::shared_ptr<const tls::Material> given_ ABSL_GUARDED_BY(mutex_);
  grpc_server_credentials* const credentials_;
};

std::shared_ptr<grpc::ChannelCredentials> ChannelCredentialsOf(const tls::Material& material) {
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = material.ca;
  options.pem_private_key = material.key;
  options.pem_cert_chain = material.certificate;
  return grpc::SslCredentials(options);
}

}  // namespace

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(std::shared_ptr<tls::Identity> identity) {
  TakeGrpcLog();
  if (identity == nullptr) return grpc::InsecureServerCredentials();
  static grpc::internal::GrpcLibraryInitializer library;  // else only gRPC's own credentials begin it
  library.summon();
  return std::make_shared<FollowingCredentials>(std::move(identity));
}

SecureChannel::SecureChannel(std::string address, std::shared_ptr<tls::Identity> identity,
                             grpc::ChannelArguments arguments)
    : address_(std::move(address)), identity_(std::move(identity)), arguments_(std::move(arguments)) {
  TakeGrpcLog();
  if (identity_ != nullptr && !identity_->peer_name().empty())
    arguments_.SetSslTargetNameOverride(identity_->peer_name());
}

const std::shared_ptr<grpc::Channel>& SecureChannel::Get() {
  const std::shared_ptr<const tls::Material> now = identity_ == nullptr ? nullptr : identity_->current();
  if (channel_ == nullptr || now != used_) {
    channel_ = grpc::CreateCustomChannel(
        address_, now == nullptr ? grpc::InsecureChannelCredentials() : ChannelCredentialsOf(*now),
        arguments_);
    used_ = now;
  }
  return channel_;
}

}  // namespace minke::rpc
