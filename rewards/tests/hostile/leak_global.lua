-- may end in: ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do secret = 1 _G.secret = 1 return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
