// A certified token issuer (npm: oidc-provider) for the tests: device flow, rotation, revocation, token exchange.
// Arguments: port (0 for any), certificate, private key, audience of access tokens, seconds of their lifetime, scopes.
// Prints its URL. POST /approve with user_code approves a login, as the user alice would in a browser.
import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import Provider, { errors } from 'oidc-provider';

const [port, certificate, key, audience, lifetime, storage] = process.argv.slice(2);
const EXCHANGE = 'urn:ietf:params:oauth:grant-type:token-exchange';
const DEVICE = 'urn:ietf:params:oauth:grant-type:device_code';
const server = createServer({ cert: readFileSync(certificate), key: readFileSync(key) });
await new Promise((listening) => server.listen(Number(port), '127.0.0.1', listening));
const url = `https://localhost:${server.address().port}`;

const resource = () => ({
  scope: storage, audience, accessTokenTTL: Number(lifetime), accessTokenFormat: 'jwt', jwt: { sign: { alg: 'RS256' } },
});
const provider = new Provider(url, {
  clients: [{
    client_id: 'pdm', client_secret: 'a secret of the tests', grant_types: ['refresh_token', DEVICE, EXCHANGE],
    redirect_uris: [], response_types: [],
  }],
  scopes: ['openid', 'offline_access', ...storage.split(' ')],
  features: {
    devInteractions: { enabled: false },
    deviceFlow: { enabled: true },
    revocation: { enabled: true },
    resourceIndicators: {
      enabled: true, defaultResource: () => audience, useGrantedResource: () => true, getResourceServerInfo: resource,
    },
  },
  rotateRefreshToken: true,
  extraTokenClaims: () => ({ 'wlcg.ver': '1.0' }),
  findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  ttl: { DeviceCode: 600, Grant: 86400, RefreshToken: 86400 },
});
provider.registerGrantType(EXCHANGE, async (ctx, next) => {
  const subject = await provider.AccessToken.find(ctx.oidc.params.subject_token);
  if (!subject) throw new errors.InvalidGrant('the subject token is unknown');
  ctx.body = { access_token: ctx.oidc.params.subject_token, issued_token_type: 'urn:ietf:params:oauth:token-type:access_token', token_type: 'Bearer', expires_in: Number(lifetime) };
  await next();
}, ['subject_token', 'subject_token_type', 'requested_token_type', 'audience', 'scope']);

const handle = provider.callback();
server.on('request', async (request, response) => {
  const asked = new URL(request.url, url);
  if (asked.pathname !== '/approve') return handle(request, response);
  const code = await provider.DeviceCode.findByUserCode(asked.searchParams.get('user_code').replace(/-/g, ''));
  const grant = new provider.Grant({ clientId: 'pdm', accountId: 'alice' });
  grant.addOIDCScope('openid offline_access');
  grant.addResourceScope(audience, storage);
  Object.assign(code, {
    accountId: 'alice', authTime: Math.floor(Date.now() / 1000), claims: {}, grantId: await grant.save(),
    scope: code.params.scope, resource: audience,
  });
  await code.save();
  response.end('approved');
});
console.log(url);
